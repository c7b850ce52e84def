"""Mixtures: shares as asked, a pure function of the sample id, one tokenizer for all."""

import pytest
import torch

from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.data.errors import DataError
from lightsparse.data.files import FilesData
from lightsparse.data.hub import HubData
from lightsparse.data.mixture import ChainedSamples, MixedSamples, MixtureData
from lightsparse.data.module import DataModule
from lightsparse.data.prepare import prepare
from lightsparse.data.prepared import PreparedData
from lightsparse.data.source import IGNORED
from lightsparse.data.stdlib import StdlibData
from lightsparse.data.tokenizer import BPE
from lightsparse.data.tokens import ByteTokenizer


class Numbered:
    """Samples that say their set and id."""

    def __init__(self, number, length):
        self.number, self.length = number, length

    def __len__(self):
        return self.length

    def __getitem__(self, sample_id):
        return {"tokens": torch.tensor([self.number, sample_id]), "sample_ids": torch.tensor(sample_id)}


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [1e-3, 1], [3, 5, 7, 11, 13]], ids=str)
def test_of_the_first_n_samples_each_source_has_its_share_and_gives_its_own_in_order(weights):
    mixed = MixedSamples([Numbered(i, 10) for i in range(len(weights))], weights)
    counts = [0] * len(weights)
    for sample_id in range(5000):
        number, own_id = mixed.place(sample_id)
        assert own_id == counts[number]
        counts[number] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (sample_id + 1) * weight / sum(weights)) < len(weights)


def test_the_place_of_a_late_sample_is_exact():
    mixed = MixedSamples([Numbered(0, 1), Numbered(1, 1)], [2, 1])
    far = 3 * 10**15
    assert {mixed.place(far + i)[0] for i in range(3)} == {0, 1}
    first, second = (max(mixed.place(far + i)[1] for i in range(3) if mixed.place(far + i)[0] == n) for n in (0, 1))
    assert first == pytest.approx(2 * 10**15, rel=1e-9) and second == pytest.approx(10**15, rel=1e-9)


def test_a_source_that_is_used_up_begins_its_next_epoch_and_ids_stay_unique():
    mixed = MixedSamples([Numbered(0, 2), Numbered(1, 100)], [1, 1])
    items = [mixed[i] for i in range(20)]
    assert [int(item["tokens"][1]) for item in items if item["tokens"][0] == 0] == list(range(10))  # 2 … 9: again
    assert [int(item["sample_ids"]) for item in items] == list(range(20))
    assert len(mixed) == 102


def test_validation_is_one_source_after_the_other_and_nothing_past_the_end():
    chained = ChainedSamples([Numbered(0, 2), Numbered(1, 3)])
    assert [chained[i]["tokens"].tolist() for i in range(7)] == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [1, 4]]
    assert [int(chained[i]["sample_ids"]) for i in range(7)] == list(range(7)) and len(chained) == 5


@pytest.fixture
def folders(tmp_path):
    for name, letters in (("a", "abc "), ("b", "xyz ")):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(letters * (20 + i))
    return tmp_path


def mixture(folders, **fields):
    sources = {name: FilesData(path=str(folders / name), val_fraction=0.3) for name in ("a", "b")}
    return MixtureData(**{"sources": sources, "weights": {"a": 1.0, "b": 3.0}, "context": 33, **fields})


def test_the_samples_of_a_run_have_the_shares_asked_for_and_settings_of_the_mixture(folders):
    samples = mixture(folders).samples(0, 200)
    kinds = ["".join(map(chr, samples.train[i]["tokens"].tolist())) for i in range(80)]
    assert sum("x" in kind for kind in kinds) == 60 and sum("a" in kind for kind in kinds) == 20
    assert samples.train[0]["tokens"].shape == (33,)
    counted = sum(int((samples.val[i]["labels"] != IGNORED).sum()) for i in range(len(samples.val)))
    assert counted == 200 and (samples.val[len(samples.val)]["labels"] == IGNORED).all()


def test_a_mixture_continues_where_it_stopped(folders):
    def batches(consumed, count):
        data = DataModule(mixture(folders, batch_size=2), 0, 400)
        data.consumed = consumed
        loader = iter(data.train_dataloader())
        return [next(loader)["tokens"].tolist() for _ in range(count)]

    assert batches(0, 12)[7:] == batches(14, 5)


@pytest.mark.parametrize("change", [{"weights": {"a": 1.0, "b": 2.0}}, {"pack": "concat"}, {"context": 32}], ids=str)
def test_another_mixture_is_another_fingerprint(folders, change):
    assert mixture(folders).samples(0, 400).manifest != mixture(folders, **change).samples(0, 400).manifest


def test_one_bpe_is_trained_on_all_sources(folders):
    data = mixture(folders).choose_tokenizer(BPE(vocab_size=270))
    samples = data.samples(0, 100)
    assert data.vocab_size == samples.tokenizer.vocab_size == 270
    assert all(len(samples.tokenizer.encode(text)) < 4 for text in ("abc abc", "xyz xyz"))


def test_sources_with_different_tokenizers_are_not_mixed(folders):
    for name, size in (("a", 270), ("b", 271), ("c", 270)):
        data = FilesData(path=str(folders / ("b" if name == "c" else name)), val_fraction=0.3)
        prepare(data.choose_tokenizer(BPE(vocab_size=size)), folders / f"out-{name}")
    parts = {name: PreparedData(path=str(folders / f"out-{name}"), val_fraction=0.3) for name in "abc"}
    with pytest.raises(DataError, match="vocabularies of different sizes"):
        _ = mixture(folders, sources={"a": parts["a"], "b": parts["b"]}).vocab_size
    with pytest.raises(DataError, match=r"data.sources.b has the tokenizer bpe-\w+, others have bpe-\w+;"):
        mixture(folders, sources={"a": parts["a"], "b": parts["c"]}).samples(0, 100)
    same = {"a": parts["a"], "b": PreparedData(path=str(folders / "out-a"), val_fraction=0.3)}
    assert len(mixture(folders, sources=same).samples(0, 100).train) > 0


def test_a_mixture_is_composed_from_the_choices_of_data(folders):
    words = ["data=mixture", "+data@data.sources.code=stdlib", "+data@data.sources.own=files", "tokenizer=bpe"]
    words += [f"data.sources.own.path={folders / 'a'}", "+data.weights={code: 1, own: 3}", "data.context=64"]
    data = compose(words).data
    assert isinstance(data, MixtureData) and data.vocab_size == 8192
    assert {name: part.context for name, part in data.parts.items()} == {"code": 64, "own": 64}
    with pytest.raises(ConfigError, match=r"data.weights is .*; it must give each of code, own a number above 0"):
        compose([*words[:-2], "+data.weights={code: 1}"])
    with pytest.raises(ConfigError, match=r"^data.sources is empty; add some"):
        compose(["data=mixture"])


def test_a_mixture_s_bytes_are_bytes(folders):
    assert mixture(folders).build_tokenizer().fingerprint == ByteTokenizer.fingerprint


def test_text_that_one_source_holds_out_is_trained_on_by_no_other(tmp_path):
    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"text {i} " * 9)
        (texts / "sub" / f"{i}.txt").write_text(f"text {i} below " * 9)
    (tmp_path / "link").symlink_to(texts / "sub")
    whole = FilesData(path=str(texts))
    for other in (
        FilesData(path=str(texts / "sub")),  # other names, so others of them are held out
        FilesData(path=str(tmp_path / "link")),
        FilesData(path=str(texts), val_fraction=0.3),
        FilesData(path=f"{texts}/*.txt", val_path=str(texts / "sub")),
        FilesData(path=str(texts / "7.txt")),  # whose end is held out
    ):
        with pytest.raises(ValueError, match=r"data.sources.a and data.sources.b share text such as [^\n]*$"):
            MixtureData(sources={"a": whole, "b": other}, weights={"a": 1, "b": 1})
    for other in (whole, FilesData(path=f"{texts}/**/*.txt"), FilesData(path=f"{tmp_path}/link/*", val_path=__file__)):
        sources = {"a": FilesData(path=f"{texts}/*.txt") if other.val_path else whole, "b": other}
        MixtureData(sources=sources, weights={"a": 1, "b": 1})


def test_sources_that_are_not_files_are_held_apart_as_well():
    for one, other in (
        (StdlibData(), StdlibData(unit="package")),
        (StdlibData(), StdlibData(val_fraction=0.2)),
        (HubData(name="a/b", val_split="validation"), HubData(name="a/b", split="validation")),
        (HubData(name="a/b", val_split="validation"), HubData(name="a/b")),
    ):
        with pytest.raises(ValueError, match=r"hold out other parts of it; validation text must not be trained on"):
            MixtureData(sources={"a": one, "b": other}, weights={"a": 1, "b": 1})
    alike = {"a": StdlibData(), "b": HubData(name="a/b"), "c": HubData(name="a/c")}
    MixtureData(sources={**alike, "d": StdlibData(), "e": HubData(name="a/b")}, weights=dict.fromkeys("abcde", 1))
