"""Teachers: training or importing them, encoding their prompts, generating their pairs."""
