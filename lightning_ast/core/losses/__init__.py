"""The values of torch's loss functions, watched for the scores that are made of losses."""

__all__: list[str] = []
