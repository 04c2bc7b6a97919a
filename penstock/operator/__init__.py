"""The operator: DynamoGraphDeployments of a cluster into the objects that run them."""
