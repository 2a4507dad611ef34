"""How much does a whole BCL training step cost over `nn.Linear`, refresh included, for every implementation?"""

from steps import step_times

from bcl_fast.measure.implementations import Size, trained_weight

SIZES = [Size(128, 64, 784), Size(512, 512, 784), Size(1024, 4096, 784), Size(4096, 1024, 784), Size(2048, 8192, 784)]
TRAINED = SIZES[:4]  # at the last size training alone takes minutes


def test_step(size, measured, roof, device, amount):
    measured(step_times, size, roof, None, device, **amount)


def test_step_of_trained_features(trained_size, measured, roof, device, amount, quick):
    weight = trained_weight(trained_size, 2 if quick else 60)
    measured(step_times, trained_size, roof, weight, device, **amount)
