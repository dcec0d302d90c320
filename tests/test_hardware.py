"""The rate of matrix products, on a pretended machine whose processes end at different times."""

import time

import numpy as np

from tunebench.hardware import product_rate


def test_a_timing_of_products_ends_when_all_processes_have_ended():
    wait, size, products = 0.05, 8, 3
    matrix = np.ones((size, size), np.float32)
    rate = product_rate(matrix, matrix, products, synchronize=lambda: time.sleep(wait))
    assert 0 < rate <= 2 * size**3 * products / wait
