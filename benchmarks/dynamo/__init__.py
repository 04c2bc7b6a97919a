"""Penstock beside Dynamo: the same load, the same model folder, workers of the same timing."""
