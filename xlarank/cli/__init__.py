"""The `xlarank` command, one file a subcommand."""
