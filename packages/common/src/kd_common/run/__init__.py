"""The parts that the commands of all packages share: command line, checkpoints, comparison and report.

They need the extra `kd-common[run]`.
"""
