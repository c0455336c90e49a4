"""Step 4 for scores that are made of losses: the values of torch's loss functions, watched in the forward.

``capture`` watches while the user's step runs, and remembers ``calls``. Once a score is asked for, each call is taken
apart, and all of them are added up as they weigh in the trained loss.
"""

__all__: list[str] = []
