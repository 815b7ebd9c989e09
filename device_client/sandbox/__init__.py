"""Training in a process of its own: no network, no files, no other program, bounded memory.

A task and a model are a program that somebody else wrote. `child` runs it, locked in by
`confinement` and `seccomp`; `process` keeps that process for the agent and believes nothing
it says; `trainer` is what the workbench sees of it; `talk` is what the two say (decision 0110).
"""
