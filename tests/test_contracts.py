"""Contract and the mapping of names to contracts; the entries themselves are tested in test_catalogue.py."""

import dataclasses

import pytest
import torch

import turnout
from turnout import CatalogueEntry, Contract
from turnout.contracts import IDS_DTYPES, WEIGHTS_DTYPES

ENTRY = CatalogueEntry(
    name="test.consumer",
    contract=Contract(ids_dtype=torch.int16),
    reads="what this test makes up",
    repository="nobody/nothing",
    path="tests/test_contracts.py",
    versions="all",
    evidence="read",
)


@pytest.fixture
def catalogue():
    """A catalogue of its own: what a test registers does not stay."""
    return type(turnout.contracts)()


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"ids_dtype": torch.int8}, ValueError, "ids_dtype must be one of torch.int16, .*torch.int64; got torch.int8"),
        ({"ids_dtype": "int32"}, ValueError, "ids_dtype must be one of .*; got 'int32'"),
        ({"weights_dtype": torch.float64}, ValueError, "weights_dtype must be one of .*; got torch.float64"),
        ({"id_space": "global"}, ValueError, "id_space must be one of logical, physical, local; got 'global'"),
        ({"id_space": "local"}, ValueError, "id_space='local' contradicts sentinel=None"),
        ({"sentinel": -1, "ids_dtype": torch.uint32}, ValueError, "sentinel=-1 contradicts ids_dtype=torch.uint32"),
        ({"sentinel": 40000, "ids_dtype": torch.int16}, ValueError, "sentinel=40000 contradicts ids_dtype=torch.int16"),
        ({"sentinel": 1.0}, TypeError, "sentinel must be an int, 'num_experts' or None"),
        ({"sentinel": True}, TypeError, "sentinel must be an int, 'num_experts' or None"),
        (
            {"structures": ("histogram",)},
            ValueError,
            "structures must be one of tokens_per_expert, .*; got 'histogram'",
        ),
        ({"structures": ("bitmatrix", "bitmatrix")}, ValueError, "structures must name each structure once"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_and_contradictory_fields_are_refused(fields, error, match):
    with pytest.raises(error, match=match):
        Contract(**fields)


def test_arguments_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        Contract(torch.int32)


def test_frozen_hashable_and_printed():
    one = Contract(ids_dtype=torch.int64, sentinel=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.ids_dtype = torch.int32
    assert repr(one) == "Contract(ids_dtype=torch.int64, weights_dtype=torch.float32, sentinel=-1)"
    assert eval(repr(one)) == one
    assert len({one, Contract(ids_dtype=torch.int64, sentinel=-1), Contract()}) == 2


def test_default_is_what_most_consumers_read():
    assert Contract() == Contract(ids_dtype=torch.int32, weights_dtype=torch.float32, sentinel=None)


@pytest.mark.parametrize("ids_dtype", IDS_DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", WEIGHTS_DTYPES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"sentinel": "num_experts"}, {"id_space": "local", "sentinel": 99, "structures": ["bitmatrix"]}],
    ids=str,
)
def test_key_reads_back(ids_dtype, weights_dtype, fields):
    one = Contract(ids_dtype=ids_dtype, weights_dtype=weights_dtype, **fields)
    assert Contract.from_key(one.key) == one
    assert one.key.isascii()


def test_the_catalogue_is_a_mapping():
    assert len(turnout.contracts) == len(list(turnout.contracts)) > 20
    for name, contract in turnout.contracts.items():
        assert isinstance(contract, Contract)
        assert turnout.contracts.entry(name).contract is contract
    assert "no.such.consumer" not in turnout.contracts


def test_unknown_name_suggests_near_ones():
    with pytest.raises(KeyError, match=r"no consumer named 'transformers\.eagr'.*Did you mean .*transformers\.eager"):
        turnout.contracts["transformers.eagr"]
    with pytest.raises(KeyError, match="`turnout contracts` lists all"):
        turnout.contracts["?"]


def test_register_adds_one(catalogue):
    before = len(catalogue)
    catalogue.register(ENTRY)
    catalogue.register(dataclasses.replace(ENTRY))  # the same again is no conflict
    assert catalogue["test.consumer"] == Contract(ids_dtype=torch.int16)
    assert catalogue.entry("test.consumer") == ENTRY
    assert len(catalogue) == len(set(catalogue)) == before + 1
    assert "test.consumer" not in turnout.contracts


def test_register_refuses_what_it_cannot_keep(catalogue):
    with pytest.raises(TypeError, match=r"register takes a turnout\.CatalogueEntry, got Contract"):
        catalogue.register(Contract())
    taken = dataclasses.replace(ENTRY, name="transformers.eager")
    with pytest.raises(ValueError, match=r"a consumer named 'transformers\.eager' is in the catalogue already"):
        catalogue.register(taken)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"evidence": "guessed"}, "evidence must be one of run, read; got 'guessed'"),
        ({"also_accepts": (torch.int8,)}, "also_accepts must be one of .*; got torch.int8"),
        ({"repository": ""}, r"repository of a catalogue entry must not be empty \(entry 'test\.consumer'\)"),
        ({"versions": ""}, "versions of a catalogue entry must not be empty"),
    ],
    ids=["evidence", "also_accepts", "repository", "versions"],
)
def test_an_entry_without_a_source_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(ENTRY, **fields)
