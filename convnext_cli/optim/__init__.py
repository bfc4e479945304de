"""How parameters move: schedule, parameter groups, averaged weights."""
