"""The commands of `vilam3-experts`, a module each: `add_parser(commands)` and `run(options) -> exit code`."""
