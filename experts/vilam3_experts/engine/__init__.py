"""How a dataset is annotated: who runs the expert, who writes, and what happens when one of them dies.

- `work`: what a run is, what goes to a worker and what comes back.
- `worker`: decodes inputs and calls the expert, in this process or in a child.
- `child`: the owner of one such child: it starts it again, ends it when it hangs, and gives up on poison.
- `committer`: writes records and audit log.
- `local`, `ray_engine`: many children on this machine, or one in each actor of Ray Data.
- `summary`: what a run did, in memory that does not grow with it.
"""
