"""Small layers of each site beside a shared 3x3 convolution.

    series    y = norm_s(u + A_s BN_s(u)),  u = conv(x)     (Rebuffi et al. 2017)
    parallel  y = norm_s(conv(x) + A_s x)                   (Rebuffi et al. 2018)

A_s is a 1x1 convolution of site s without bias. It starts at zero, so that a network
begins as the one without adapters; the originals start at random. An adapter is a
constructor, `adapter(stride, name=...)`, that `norm.ConvNorm` has as its field;
`ADAPTERS` has them by the name in config.model.adapter.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.models.norm import PerSiteBatchNorm, check_site
from cxai_jax.types import Array, Mode


class SiteConv(nn.Module):
    """A 1x1 convolution of each site, kernel [S, C, features], zero at the start.

    Every row is multiplied by the kernel of its own site; the batch is never split.

    Attributes:
      features: output channels.
      num_sites: S.
      stride: step in rows and columns.
    """

    features: int
    num_sites: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, site: Array | None) -> Array:
        """[B, H, W, C] -> [B, H', W', features]; raises ValueError without a site."""
        check_site(site, x, self.num_sites)
        shape = (self.num_sites, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros, shape).astype(x.dtype)
        # A product, not an index: see PerSiteBatchNorm.
        own = jax.nn.one_hot(site, self.num_sites, dtype=x.dtype)
        kernels = jnp.einsum("bs,scd->bcd", own, kernel)
        x = x[:, :: self.stride, :: self.stride]
        return jnp.einsum("bhwc,bcd->bhwd", x, kernels)


class Series(nn.Module):
    """u -> u + A_s BN_s(u), on the output of the convolution.

    Attributes:
      stride: of the convolution, which its output has behind it.
      num_sites: S.
    """

    stride: int
    num_sites: int

    @nn.compact
    def __call__(self, x: Array, u: Array, mode: Mode, site: Array | None) -> Array:
        """Input x and output u of the convolution -> [B, H', W', C']."""
        norm = PerSiteBatchNorm(u.shape[-1], num_sites=self.num_sites, name="norm")
        conv = SiteConv(u.shape[-1], self.num_sites, name="conv")
        return u + conv(norm(u, mode, site), site)


class Parallel(nn.Module):
    """u -> u + A_s x, with the stride of the convolution.

    Attributes:
      stride: of the convolution.
      num_sites: S.
    """

    stride: int
    num_sites: int

    @nn.compact
    def __call__(self, x: Array, u: Array, mode: Mode, site: Array | None) -> Array:
        """Input x and output u of the convolution -> [B, H', W', C']."""
        conv = SiteConv(u.shape[-1], self.num_sites, self.stride, name="conv")
        return u + conv(x, site)


# Name in config.model.adapter -> function of the number of sites that gives it.
ADAPTERS: dict[str, Callable[[int], Callable[..., nn.Module] | None]] = {
    "none": lambda num_sites: None,
    "series": lambda num_sites: functools.partial(Series, num_sites=num_sites),
    "parallel": lambda num_sites: functools.partial(Parallel, num_sites=num_sites),
}
