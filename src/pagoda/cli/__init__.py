"""The command line: `main` parses, `commands` says what each command takes and does."""
