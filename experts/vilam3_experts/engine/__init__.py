"""Annotation engines: who runs the expert, who writes, and what happens when a process dies.

- `job`: the description of a run, and the messages to and from workers.
- `worker`: decodes inputs and calls the expert, in this process or in a child.
- `worker_process`: owns one such child: restarts it, kills it on timeout, gives up on inputs that crash it.
- `committer`: writes records and the audit log.
- `local`, `ray_engine`: many workers on this machine, or one in each actor of Ray Data.
- `summary`: what a run did, in bounded memory.
"""
