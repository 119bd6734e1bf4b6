"""The faces of the jobs: the command line `lora-diffusion` (and the web app, when it is there)."""
