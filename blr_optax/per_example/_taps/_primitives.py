"""Names of JAX's primitives, by what `_coupling` has to know of them."""

LINEAR = (
    "add", "sub", "neg", "reduce_sum", "convert_element_type", "reshape", "squeeze", "copy",
    "broadcast_in_dim", "expand_dims", "stop_gradient", "copy_p", "transpose", "slice",
    "dynamic_slice", "gather", "concatenate", "rev", "split", "pad", "stack", "unstack", "select_n",
    "real", "imag", "conj", "reduce_precision", "add_any", "sharding_constraint", "name",
    "optimization_barrier", "reshard", "mesh_cast", "pvary", "tile", "device_put",
)  # fmt: skip
# What multiplies the power of a factor.
POWERS = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "abs": 1, "reduce_max": 1, "reduce_min": 1}
STILL_INDEX = ("add", "lt", "select_n", "broadcast_in_dim", "reshape", "convert_element_type",
               "squeeze", "transpose", "concatenate")  # fmt: skip
ELEMENTWISE = ("add", "sub", "mul", "div", "rem", "neg", "pow", "integer_pow", "exp", "max", "min",
               "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "select_n")  # fmt: skip
# How many of the last axes are one matrix.
MATRIX = {"cholesky": 2, "lu": 2, "qr": 2, "geqrf": 2, "householder_product": 2, "eigh": 2,
          "eig": 2, "svd": 2, "schur": 2, "hessenberg": 2, "top_k": 1}  # fmt: skip
ALONG = {"rev": "dimensions", "sort": "dimension", "cumsum": "axis", "cumprod": "axis",
         "cummax": "axis", "cummin": "axis", "cumlogsumexp": "axis",
         "concatenate": "dimension"}  # fmt: skip
CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# Each number from those at its place, or rules of their own.
KNOWN = {
    *LINEAR, *POWERS, *ELEMENTWISE, *MATRIX, *ALONG,
    "acos", "acosh", "approx_top_k", "argmax", "argmin", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex",
    "conv_general_dilated", "cos", "cosh", "digamma", "dot_general", "dynamic_update_slice", "erf",
    "erf_inv", "erfc", "exp2", "expm1", "fft", "floor", "igamma", "igammac", "is_finite", "lgamma",
    "log", "log1p", "logistic", "lu_pivots_to_permutation", "nextafter", "one_minus_square",
    "polygamma",
    "population_count", "random_bits", "random_clone", "random_fold_in", "random_gamma",
    "random_gamma_grad", "random_seed", "random_split", "random_unwrap", "random_wrap",
    "reduce_and", "reduce_or", "reduce_prod", "reduce_window", "reduce_window_max",
    "reduce_window_min", "reduce_window_sum", "reduce_xor", "regularized_incomplete_beta",
    "round", "scatter", "scatter_add", "scatter_max", "scatter_min", "scatter_mul", "scatter-add",
    "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "select_and_gather_add",
    "select_and_scatter_add", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sign", "sin", "sinh", "tan", "tanh", "threefry2x32", "triangular_solve",
    "tridiagonal_solve", "xor", "zeta",
}  # fmt: skip
