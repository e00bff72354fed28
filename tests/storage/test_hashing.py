import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import BadInput, RunFailed
from lorakit.storage.hashing import check_sha256, sha256_file, sha256_json


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    with pytest.raises(RunFailed, match="ENOENT"):
        sha256_file(tmp_path / "none")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_order_of_keys_does_not_change_a_digest(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert sha256_json(value) == sha256_json(turned)
    assert sha256_json(value) != sha256_json([value])


def test_a_wrong_checksum_names_both_digests(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"right")
    right = sha256_file(path)
    check_sha256(path, right, "adapter")
    path.write_bytes(b"wrong")
    with pytest.raises(RunFailed, match="checksum") as caught:
        check_sha256(path, right, "adapter")
    assert caught.value.id == "adapter.damaged"
    assert right[:12] in caught.value.message
    assert sha256_file(path)[:12] in caught.value.message
    assert str(path) == caught.value.where.file
    with pytest.raises(BadInput):
        check_sha256(tmp_path / "none", right, "adapter")
