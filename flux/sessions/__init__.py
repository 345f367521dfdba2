"""Images one after another: batches of prompts, options, typed commands, numbered files."""
