import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    """No silent promotion between dtypes in kl_reg/kl/."""
    with jax.numpy_dtype_promotion("strict"):
        yield
