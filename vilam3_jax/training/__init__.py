"""Program, train step, optimizer, state, hooks and telemetry of a training run."""
