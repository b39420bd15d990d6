"""GGUF files: what is read, what is kept, what is refused."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from support.gguf_files import TEMPLATE, gguf, random_llama, write_gguf

import reftheads as rh


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFTHEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return random_llama()


@pytest.fixture
def file(llama, tmp_path):
    return write_gguf(llama, tmp_path / "tiny.gguf")


def entry(cache):
    """The folder of the only conversion that is kept."""
    [folder] = [path for path in (cache / "gguf").iterdir() if path.is_dir()]
    return folder


def same(model, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_file_loads_as_the_model_that_it_was_written_from(llama, file):
    base, tokenizer = rh.load_base(file)
    assert type(base) is type(llama) and not base.training and same(llama, base)
    assert getattr(base.config, "quantization_config", None) is None
    ids = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(base(ids).logits, llama(ids).logits)


def test_quantised_blocks_become_the_numbers_that_they_stand_for(llama, tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_1
    base, _ = rh.load_base(write_gguf(llama, tmp_path / "blocks.gguf", kind=kind))
    name = "model.layers.1.mlp.down_proj.weight"
    blocks = llama.state_dict()[name].reshape(-1, 32)
    low = blocks.amin(1, keepdim=True)
    step = (blocks.amax(1, keepdim=True) - low) / 15
    expected = step.half().float() * ((blocks - low) / step).round() + low.half().float()
    assert base.dtype == torch.float32
    torch.testing.assert_close(base.state_dict()[name].reshape(-1, 32), expected)


def test_the_tokenizer_is_that_of_the_file(file):
    _, tokenizer = rh.load_base(str(file))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 128
    text = "a  12\n\n1 déjà vu 😀<|im_end|>\t"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template == TEMPLATE
    talk = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\na<|im_end|>\n"
    assert ids[0] == 1 and 2 in ids


@pytest.mark.parametrize("words, tokens", [("smollm", "a ĠĠ 1 2 ĊĊ 1"), ("gpt-2", "a Ġ Ġ 12 Ċ Ċ 1")])
def test_digits_stand_apart_if_the_file_says_so(llama, tmp_path, words, tokens):
    _, tokenizer = rh.load_base(write_gguf(llama, tmp_path / "words.gguf", words=words))
    assert tokenizer.tokenize("a  12\n\n1") == tokens.split()


def test_a_file_is_converted_once_and_needs_no_package_after_that(file, llama, cache, monkeypatch):
    rh.load_base(file)
    before = {path.name: path.stat().st_mtime_ns for path in entry(cache).iterdir()}
    copy = file.with_name("copy.gguf")
    copy.write_bytes(file.read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    for again in (file, copy):  # by content, not by name
        base, tokenizer = rh.load_base(again)
        assert same(llama, base) and tokenizer.chat_template == TEMPLATE
    assert {path.name: path.stat().st_mtime_ns for path in entry(cache).iterdir()} == before


def test_another_file_in_the_same_place_is_converted_anew(file, llama):
    rh.load_base(file)
    torch.manual_seed(5)
    other = random_llama()
    write_gguf(other, file)
    assert same(other, rh.load_base(file)[0])


def halved(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_a_wrong_byte(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def without_a_file(folder):
    (folder / "tokenizer.json").unlink()


def without_checksums(folder):
    (folder / "checksums.json").unlink()


def with_half_of_the_checksums(folder):
    (folder / "checksums.json").write_text('{"model.saf')


@pytest.mark.parametrize(
    "damage", [halved, with_a_wrong_byte, without_a_file, without_checksums, with_half_of_the_checksums]
)
def test_a_conversion_that_is_damaged_is_made_anew(file, llama, cache, damage):
    rh.load_base(file)
    damage(entry(cache))
    base, tokenizer = rh.load_base(file)
    assert same(llama, base) and tokenizer.chat_template == TEMPLATE
    checksums = json.loads((entry(cache) / "checksums.json").read_text())
    assert checksums.keys() == {path.name for path in entry(cache).iterdir()} - {"checksums.json"}


def test_a_cache_that_cannot_be_written_is_a_warning(file, llama, cache):
    cache.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="converted anew each time.*let REFTHEADS_CACHE name a folder") as warned:
        base, tokenizer = rh.load_base(file)
    assert [warning.filename for warning in warned if "converted anew" in str(warning.message)] == [__file__]
    assert same(llama, base) and tokenizer.chat_template == TEMPLATE


@pytest.mark.slow
def test_processes_that_load_a_new_file_at_once_convert_it_once(file, cache):
    program = (
        f"import torch, reftheads as rh; base, _ = rh.load_base({str(file)!r}); print(sum(p.sum() for p in "
        "base.parameters()).item())"
    )

    def run(_):
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, range(2)))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[0].stdout == done[1].stdout
    assert sum("Converting and de-quantizing" in process.stderr for process in done) == 1
    assert entry(cache)


def test_a_file_is_named_within_a_folder_or_by_its_path(file, llama):
    for base in (rh.load_base(file)[0], rh.load_base(str(file.parent), gguf_file="tiny.gguf")[0]):
        assert same(llama, base)


def test_a_file_is_found_in_the_cache_of_the_hub(file, llama, tmp_path):
    repository = tmp_path / "hub" / "models--somebody--tiny-GGUF"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    file.rename(repository / "snapshots" / "abc" / "tiny.gguf")
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    base, _ = rh.load_base("somebody/tiny-GGUF", gguf_file="tiny.gguf", **options)
    assert same(llama, base)
    with pytest.raises(OSError, match="no file 'other.gguf' of 'somebody/tiny-GGUF'"):
        rh.load_base("somebody/tiny-GGUF", gguf_file="other.gguf", **options)


def test_options_hold_for_what_a_file_becomes(file):
    base, _ = rh.load_base(file, dtype="bfloat16", auto_class=tf.AutoModel)
    assert type(base) is tf.LlamaModel and base.dtype == torch.bfloat16


def test_an_adapter_on_a_file_is_saved_and_loaded(file, tmp_path):
    graph = rh.InterventionGraph(rh.Node(rh.LoReFT(2), layer=1, positions="l1"))
    model = rh.InterventionModel(rh.load_base(file)[0], graph)
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(file)
    loaded = rh.InterventionModel.from_pretrained(rh.load_base(file)[0], tmp_path / "adapter")
    assert same(model, loaded)


CUT = [0, 3, 4, 10, 24, 300, 5000, 200_000, -1]


@pytest.mark.parametrize("length", CUT)
def test_a_file_that_is_cut_off_is_refused(file, cache, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="get it again" if abs(length) > 3 or length < 0 else "is no GGUF file"):
        rh.load_base(file)
    assert not cache.exists()


REFUSED = {
    "a text": (lambda llama, path: path.write_text("# weights"), "is no GGUF file, since it begins with b'# we'"),
    "an unknown architecture": (
        lambda llama, path: write_gguf(llama, path, architecture="rwkv99"),
        "the architecture 'rwkv99', which transformers .* does not read from GGUF files: load the checkpoint",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_before_anything_is_written(llama, tmp_path, cache, kind):
    write, message = REFUSED[kind]
    write(llama, tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match=message):
        rh.load_base(tmp_path / "bad.gguf")
    assert not cache.exists()


def test_a_file_without_a_tensor_or_a_tokenizer_is_refused_and_nothing_is_kept(llama, tmp_path, cache):
    lacking = write_gguf(llama, tmp_path / "lacking.gguf", without=["blk.1.ffn_up.weight"])
    with pytest.raises(ValueError, match=r"lacks tensors of its model: model\.layers\.1\.mlp\.up_proj\.weight"):
        rh.load_base(lacking)
    with pytest.raises(ValueError, match="has no tokenizer that transformers can read"):
        rh.load_base(write_gguf(llama, tmp_path / "mute.gguf", words=None))
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]


def test_without_the_package_gguf_the_error_says_how_to_get_it(file, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="the package gguf is needed.*pip install gguf"):
        rh.load_base(file)
    assert not cache.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("no.gguf", None), r"there is no file '.*no\.gguf'; GGUF files there: tiny\.gguf"),
        ((".", "no.gguf"), r"there is no file 'no\.gguf' in .*; GGUF files there: tiny\.gguf"),
        ((".", None), r"holds GGUF files: give gguf_file=.*: tiny\.gguf"),
        (("tiny.gguf", "tiny.gguf"), "says itself which file is meant: leave gguf_file='tiny.gguf' out"),
    ],
)
def test_a_file_that_is_not_there_or_named_twice_is_an_error(file, arguments, message):
    name, gguf_file = arguments
    with pytest.raises(ValueError, match=message):
        rh.load_base(file.parent / name, gguf_file=gguf_file)


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True)}], ids=["bits", "config"]
)
def test_a_file_is_not_quantised_again(file, options):
    with pytest.raises(ValueError, match="does not go with it: leave it out, or load the checkpoint"):
        rh.load_base(file, **options)
