"""How do others do a part of the work: torch's own sorts, two SOM packages, a vector quantizer with dead codes?"""

import peers

from bcl_fast.measure.implementations import Size

SIZES = [Size(128, 64, 784), Size(1024, 1024, 784)]


def test_selection(size, measured, device, amount):
    measured(peers.selection_times, size, device, **amount)


def test_som_epoch(measured, images, quick):
    measured(peers.som_epoch, images.train, images.held_out, 4 if quick else 8)


def test_revival(measured, images, quick):
    measured(peers.revival, images.train, images.held_out, 4 if quick else 8)
