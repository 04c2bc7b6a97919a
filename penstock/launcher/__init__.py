"""A graph's services as local processes.

`supervisor` runs them, one `replica` each; `plan` decides what is started, `control` is how other commands
reach a running supervisor, `state` names its files.
"""
