"""What several test files share: where backends run, layers and models to train, inputs of stages and operators."""
