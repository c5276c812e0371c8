"""Ground floor: the types that every other floor speaks in. Imports nothing of the house."""
