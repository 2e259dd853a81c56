from personalize_jax import command


def test_progress_after_a_resume_counts_from_where_it_went_on(capsys):
    with command.steps_bar("training", 10) as progress:
        progress(6, {})
        begun = capsys.readouterr().err
        progress(10, {"loss": 0.125})
    written = capsys.readouterr().err
    assert "6/10" in begun and "10/10" in written and "loss=0.1250" in written
