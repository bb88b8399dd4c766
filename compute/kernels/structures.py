"""What the kernels take by address: the structures of kernels.h and decoder.c, field by field."""

from ctypes import Structure, c_float, c_int, c_long, c_void_p


class Weights(Structure):
    _fields_ = [
        ("packed", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_long),
        ("num_inputs", c_long),
    ]


class Paged(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "tables", "contexts")),
        ("table_stride", c_long),
        *((name, c_int) for name in ("num_heads", "num_kv_heads", "dim", "block_size")),
    ]


class Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "mlp_norm")),
        *((name, Weights) for name in ("qkv", "o", "gate_up", "down")),
    ]


class Decoder(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("layers", "norm")),
        ("head", Weights),
        *((name, c_long) for name in ("num_layers", "width")),
        *((name, c_int) for name in ("num_heads", "num_kv_heads", "dim", "is_share")),
        ("eps", c_float),
    ]


class Step(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("cos", "signed_sin", "slots", "tables", "contexts")),
        *((name, c_long) for name in ("table_stride", "num_seqs")),
        ("cache", c_void_p),
        *((name, c_long) for name in ("layer_stride", "values_at")),
        ("block_size", c_int),
        ("partials", c_void_p),
    ]
