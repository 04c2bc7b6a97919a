"""The fault lab on real processes: a real graph, real clients, and everything that can happen to them.

    python -m checks.faults [--quick] [--duration 600] [--engine sim|reference] [--only NAME...]

Every episode sends a burst of requests into a healthy graph, lets a fault happen while they are in one
phase (queued, prefill, transfer, decode), and checks every answer token by token against what it must be:
with the sim engine a function of (seed, position), with the reference engine what the calm graph said.

`processes.py` starts the graph with a proxy (`proxy.py`) in front of every worker's ports, `faults.py` is
the catalogue, `clients.py` asks and checks, `episode.py` runs one fault at one phase, `report.py` makes the
table, also that of docs/reliability.md.
"""
