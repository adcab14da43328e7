"""Commands of `vilam3-experts`. Each module has `add_parser(commands)` and `run(options) -> exit code`."""
