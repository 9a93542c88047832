"""What if: hardware profiles, the replay of a recorded run, modelled systems, sweeps. Every time in it is modelled."""
