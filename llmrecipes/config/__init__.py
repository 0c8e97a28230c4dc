"""Floor 1: what to run. Flags and YAML files become one frozen, checked dataclass; nothing here imports torch."""
