"""Tokenizers: exactness, agreement with transformers, end-of-document detection."""

import json

import pytest

from phd_megatron.cli.main import main
from phd_megatron.data.bpe import parse_bpe, train_bpe
from phd_megatron.data.tokenizers import EOD_TOKEN, ByteTokenizer, load_tokenizer
from phd_megatron.errors import UserError

TEXTS = [
    "",
    "plain text",
    "  leading and trailing  ",
    "emoji 👩‍👩‍👧‍👦 and ñ, 漢字, \u200b",
    "NUL \x00 and \x7f \x80 ÿ \xad",
    "CRLF\r\n\ttab\n\n\n",
    f"a literal {EOD_TOKEN} in the text",
    "".join(map(chr, range(0x250))),
    "  don't  merge , this . ",
]


@pytest.fixture(scope="module")
def bpe_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    text = ["def f(x):\n    return x + 1\n", "the cat sat on the mat ", "naïve 漢字 👍 "] * 50
    training = train_bpe([text], 300, 1, directory)
    assert training.vocab_size == 300
    return directory


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer()
    for text in TEXTS:
        assert tokenizer.tokenize(text) == list(text.encode())
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (257, 256, 256)
    assert tokenizer.detokenize([97, 256, 98]) == "ab"
    assert tokenizer.detokenize([97, 256, 98], skip_special_tokens=False) == f"a{EOD_TOKEN}b"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_same_ids_through_transformers(kind, tmp_path, bpe_directory):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer("byte" if kind == "byte" else bpe_directory)
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert theirs.eos_token_id == ours.eod
    assert theirs.pad_token_id == ours.pad
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        ids = ours.tokenize(text)
        assert theirs(text)["input_ids"] == ids, text
        assert ours.eod not in ids
        assert ours.detokenize(ids) == text
        assert theirs.decode(ids) == text
    broken = [*"é".encode()[:1], 0x61, 0xF0, 0x9F, 0x92, 0xFF, 0x62] if kind == "byte" else [*range(1, 257)]
    assert ours.detokenize([*broken, ours.eod]) == theirs.decode([*broken, ours.eod], skip_special_tokens=True)
    assert "\ufffd" in ours.detokenize(broken)


def test_all_single_bytes_decode_alike(tmp_path):
    library = pytest.importorskip("tokenizers")
    ByteTokenizer().save(tmp_path)
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for byte in range(256):
        for tail in ([], [0x80], [0xBF, 0xBF], [0x41]):
            ids = [0x41, byte, *tail]
            assert ByteTokenizer().detokenize(ids) == theirs.decode(ids)


def test_saved_directories_load_again(tmp_path, bpe_directory):
    ByteTokenizer().save(tmp_path / "byte")
    assert isinstance(load_tokenizer(tmp_path / "byte"), ByteTokenizer)
    first = load_tokenizer(bpe_directory)
    first.save(tmp_path / "bpe")
    second = load_tokenizer(tmp_path / "bpe")
    assert first.unique_identifiers == second.unique_identifiers
    json.dumps(second.unique_identifiers)
    assert [ids.tolist() for ids in second.encode_batch(TEXTS)] == [first.tokenize(text) for text in TEXTS]


def test_eod_is_found_or_refused(tmp_path, bpe_directory):
    def variant(name, **settings):
        directory = tmp_path / name
        load_tokenizer(bpe_directory).save(directory)
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        return directory

    assert (
        load_tokenizer(variant("a", eos_token={"content": "a"})).eod == load_tokenizer(bpe_directory).tokenize("a")[0]
    )
    candidate = variant("b")
    assert load_tokenizer(candidate).eod == 0
    by_config = variant("c")
    (by_config / "config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = load_tokenizer(by_config)
    assert tokenizer.eod == 7
    tokenizer.save(tmp_path / "copy")  # config.json does not travel, the finding does
    assert load_tokenizer(tmp_path / "copy").eod == 7
    nothing = variant("d")
    text = (nothing / "tokenizer.json").read_text().replace(EOD_TOKEN, "<|other|>")
    (nothing / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(nothing)


@pytest.mark.parametrize("spec", ["bpe:1000", "no/such/dir"])
def test_unknown_tokenizers_are_refused(spec):
    with pytest.raises(UserError):
        load_tokenizer(spec)


def test_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError):
        (tmp_path / "empty").mkdir()
        load_tokenizer(tmp_path / "empty")


def test_parse_bpe():
    assert parse_bpe("byte") is None
    assert parse_bpe("bpe:4096") == 4096
    for wrong in ("bpe:", "bpe:256", "bpe:-1", "bpe:1e4", "bpe:²"):
        with pytest.raises(UserError, match="257"):
            parse_bpe(wrong)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", '{"a": ' * 100_000, "tokenizer_config.json cannot be read"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json cannot be read"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "added_tokens": [1]}', "cannot be read by the tokenizers"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "added_tokens": 5}', "cannot be read by the tokenizers"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "pre_tokenizer": [1]}', "cannot be read by the tokenizers"),
    ],
    ids=["deep settings", "deep", "added number", "added no list", "cuts a list"],
)
def test_odd_json_of_a_tokenizer_is_refused(tmp_path, capsys, bpe_directory, name, text, message):
    load_tokenizer(bpe_directory).save(tmp_path / "odd")
    (tmp_path / "odd" / name).write_text(text)
    (tmp_path / "text.txt").write_text("some words")
    words = ["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "data")]
    assert main([*words, "--workers", "1", "--tokenizer", str(tmp_path / "odd")]) == 2
    said = capsys.readouterr().err
    assert message in said and "copy" in said and "Traceback" not in said
