from __future__ import annotations

from mtl_export.graph import names


def test_names_are_those_that_users_read() -> None:
    """Names in the file are a contract: base names stay, ours derive from the module."""
    assert names.weight_t("enc.dense") == "enc.dense.weight_t"
    assert names.bias("enc.dense") == "enc.dense.bias"
    assert names.part("enc.dense", "core") == "enc.dense.core"
    assert names.value("enc.dense", "add") == "enc.dense/add"
    assert names.DOMAIN == "mtl_export"
    assert (names.BATCH, names.SEQUENCE) == ("batch", "sequence")
