"""From images to records: the clean pass, the engine, the store, and the check of what was stored."""
