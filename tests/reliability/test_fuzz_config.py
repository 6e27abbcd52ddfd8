"""The parsers of configurations and of argument files, given any JSON: success, or an error that says what is wrong."""

import json
from dataclasses import fields

from hostile_profile import documented, hypothesis

from unitok_hf import UniTokConfig, UniTokVQModel
from unitok_hf_cli import COMMANDS, Parser, add_arguments, read_file


st = hypothesis.strategies

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 130), st.floats(), st.text(max_size=8),
    st.sampled_from(["../../x", "evil/kernel", "os.system", "nanochat", "gpt2", "llama", "unitok_hf", "auto", 64, 384]),
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)  # fmt: skip
OWN = [name.name for name in fields(UniTokConfig)]
LIBRARY = [
    "_attn_implementation", "attn_implementation", "quantization_config", "auto_map", "id2label", "layer_types",
    "rope_parameters", "torch_dtype", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "to_dict",
    "__class__", "__dict__", "__post_init__", "from_dict", "sub_configs", "attribute_map", "model_type", "base_model_tp_plan",
]  # fmt: skip
VQ = [
    "block_out_channels",
    "num_vq_embeddings",
    "layers_per_block",
    "in_channels",
    "patch_size",
    "pixel_range",
    "act_fn",
]
keys = st.one_of(st.sampled_from(OWN), st.sampled_from(LIBRARY), st.text(max_size=8))
parts = st.dictionaries(st.one_of(st.sampled_from(LIBRARY + OWN + VQ), st.text(max_size=6)), anything, max_size=5)
configurations = st.dictionaries(keys, st.one_of(anything, parts), max_size=6)


@hypothesis.given(content=configurations, how=st.sampled_from(["constructor", "from_dict", "json"]))
def test_any_keys_and_values_make_a_configuration_or_are_refused(content, how, tmp_path_factory):
    with documented():
        if how == "constructor":
            made = UniTokConfig(**content)
        elif how == "from_dict":
            made = UniTokConfig.from_dict(content)
        else:
            folder = tmp_path_factory.getbasetemp() / "config"
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(content))
            made = UniTokConfig.from_pretrained(folder)
        assert made.vocab_size == made.text_config.vocab_size == made.vocabulary.size > 0
        assert type(made) is UniTokConfig and made.vocabulary.codes_per_image > 0


@hypothesis.given(
    text=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
)
def test_any_bytes_are_a_configuration_or_are_refused(text, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(text)
    with documented():
        UniTokConfig.from_pretrained(folder)
    with documented():
        UniTokVQModel.from_pretrained(folder)


FLAGS = add_arguments(Parser(), COMMANDS["train"])
argument_keys = st.one_of(st.sampled_from(sorted(FLAGS)), st.text(max_size=8))
texts = st.one_of(
    st.dictionaries(argument_keys, anything, max_size=5).map(json.dumps), anything.map(json.dumps), st.text(max_size=60),
    st.text(alphabet="&*!|>{}[]:,-?#%@`'\" \n\tax01.", max_size=60),
)  # fmt: skip


@hypothesis.given(text=texts, suffix=st.sampled_from([".json", ".yaml"]))
def test_any_file_of_arguments_gives_values_of_the_right_types_or_is_refused(text, suffix, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / f"arguments{suffix}"
    file.write_text(text, encoding="utf-8", errors="replace")
    with documented():
        values = read_file(file, FLAGS)
        assert set(values) <= {field.name for field in FLAGS.values()}
