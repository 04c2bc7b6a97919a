"""The fault lab: real workers and frontends in one process, on virtual time, with things going wrong.

Everything that decides is the production code: router, worker, link, wire, core, scheduler, block pool.
Only what surrounds them is simulated: time, the network, discovery, the arithmetic of the model, and the
operating system's processes, which can be frozen and killed. One seed decides all that happens.
"""
