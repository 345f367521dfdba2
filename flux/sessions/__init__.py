"""Images one after another, as the command line asks for them: options, typed commands, numbered files."""
