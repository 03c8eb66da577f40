"""From real parallel source code to instruction data whose every answer was compiled and run."""
