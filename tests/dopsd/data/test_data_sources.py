from data_helpers import assert_names, error_of, read_pictures


def test_both_or_neither_source_is_an_error(tmp_path):
    for flags in ({}, {"instance_data_dir": str(tmp_path), "dataset_name": "a/b"}):
        assert_names(error_of(read_pictures, **flags), "--instance_data_dir", "--dataset_name", "exactly one")
