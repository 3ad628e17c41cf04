import pytest

from nextstep_jax.interop import convert


def test_layers_are_numbers():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "norm", "embed"]
    ordered = ["embed", "layers.2.a", "layers.2.b", "layers.10.a", "norm"]
    assert sorted(names, key=convert.natural_key) == ordered


def test_out_may_be_a_link_to_an_empty_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with convert.written_aside(tmp_path / "link") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "link" / "file").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_two_runs_do_not_share_a_folder(tmp_path):
    with convert.written_aside(tmp_path / "a") as one:
        with pytest.raises(OSError), convert.written_aside(tmp_path / "a") as two:
            assert one != two
            (one / "first").touch()
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "of another").touch()
        assert (one / "first").exists() and not two.exists()
        (tmp_path / "a" / "of another").unlink()
    assert (tmp_path / "a" / "first").exists()
