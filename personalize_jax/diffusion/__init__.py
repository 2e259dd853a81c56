"""The mathematics of diffusion: functions of arrays, no networks."""
