"""Which settings, how many replicas, at what cost: answered by simulating the workload on measured steps.

Owns: nothing.
Never: claims what neither a measurement nor a simulation has shown.
"""
