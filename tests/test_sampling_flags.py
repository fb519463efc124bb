import pytest

from models.generate import SamplingConfig
from utils.sampling.flags import guided_scales, read_sampling, temperatures


def test_what_people_write_is_read():
    assert [guided_scales(text) for text in ("", "3-8", "4")] == [None, (3, 8), (4, 4)]
    assert [temperatures(text) for text in ("1", "0.9", "1,0.5")] == [(1, 1), (0.9, 0.9), (1, 0.5)]
    assert read_sampling("") == SamplingConfig()
    written = "cfg=2 cfg_schedule=constant cfg_scales=3-8 temperature=1:0.5 top_k=0 top_p=0 min_p=0.05"
    assert read_sampling(written) == SamplingConfig(2.0, 0, 0.0, False, "constant", (3, 8), (1.0, 0.5), 0.05)


@pytest.mark.parametrize("text", ["x", "3-", "-3", "3-x", "3-4-5"])
def test_other_scales_are_refused(text):
    with pytest.raises(ValueError, match="--cfg_scales"):
        guided_scales(text)


@pytest.mark.parametrize("text", ["", "warm", "1,2,3", "0", "-1", "nan", "inf"])
def test_other_temperatures_are_refused(text):
    with pytest.raises(ValueError, match="--temperature"):
        temperatures(text)


@pytest.mark.parametrize("text", ["cfg", "cgf=2", "cfg=x", "cfg=-1", "smooth=1"])
def test_other_ways_of_drawing_are_refused(text):
    with pytest.raises(ValueError, match="cfg|smooth|guidance_scale"):
        read_sampling(text)
