import re
import warnings

import pytest
from diffusers import IFPipeline

from personalize_jax.formats.caption_cleaning import clean_caption
from tests.public_tokenizers import VOCABULARIES, skip_without

CAPTIONS = [
    "",
    "   ",
    "A Photo of a DOG",
    "a dog at https://example.com/dogs?id=3 in the snow",
    "www.dogs.co.uk, dogs.org/best-of/ and me@dogs.com",
    "photo by @rex_the_dog for rex@example.org",
    "http:/one http:///three https:x www:/y",
    "a+dog%20on%20the+beach %C3%A9clair",
    "<b>a dog</b> <i>in the snow<br/></i><!-- by rex -->",
    "<person> with a dog, 1 < 2 and 3 > 2",
    "<script>alert('dog')</script>a dog<style>p{}</style>",
    "dog &amp; cat &quot;friends&quot; &amp;amp; &lt;b&gt; &#39;x&#39; &amp &quot",
    "狗 一只狗 a dog ㈱ ㌀ ㇰ ㇀ 㐀 ䷀ カタカナ 한국어",
    "dash\u2014dash \u2010 \u2015 \u301c \u3030 \uff0d minus-minus",
    "this-is-my-cute-cat",
    "this_is_my_cute_cat and-dog",
    "one-two-three-four",
    "`quotes´ «guillemets» “double” ‘single’ ¨dots¨",
    '"""AUSVERKAUFT""" \'\'two\'\'',
    "***SALE*** #SALE (now) [here] {there} | \\ / ~ ® © ™ ½ § §",
    "wait... what.. a dog . and a cat",
    r"line\nbreak and 10:25 ",
    "real\nline\tbreaks\r\nand \u00a0 spaces\u2003here",
    "server 192.168.0.1 at 10.0.0.255",
    "#1 #123 #1234 #12345 #123456",
    "1 12345 123456 12345678 dogs",
    "dog.png, my.holiday.JPG and /home/me/dog.webp",
    "png images of a dog, jpg image, mp4",
    "1024x768 3.5x4 10×20 2х3 x4",
    "jc6640 jc6640vc 6640vc231 j2d1a2a abc12 a1b",
    "free shipping worldwide free shipping, free download free",
    "click for more, click on dog, click here",
    "page 12 of a book, page twelve",
    "colon : spaced, comma,dog and full.stop/slash",
    "'quoted caption'",
    "-leading dash",
    ";semicolon: trailing colon:",
    ".hidden",
    "café naïve Ünïcödé ß İstanbul ﬁne",
    "cafÃ© itâ€™s mojibake",
    "emoji 😀 dog 🐶\u200b zero\u200dwidth",
    "١٢٣٤٥٦٧ arabic digits 12٣",
    "&lt;a href=&quot;http://x.com&quot;&gt;dog&lt;/a&gt;",
    "a [V] dog",
    "a <new1> dog, a sks dog, a xyz123 dog",
    "100% dog + cat",
]


@pytest.fixture(scope="module")
def of_diffusers():
    pipeline = IFPipeline.__new__(IFPipeline)  # its cleaning needs none of its networks
    return lambda captions: pipeline._text_preprocessing(captions, clean_caption=True)


@pytest.mark.filterwarnings("ignore")
def test_captions_are_cleaned_as_by_diffusers(of_diffusers):
    assert dict(zip(CAPTIONS, map(clean_caption, CAPTIONS), strict=True)) == dict(
        zip(CAPTIONS, of_diffusers(CAPTIONS), strict=True)
    )


@pytest.mark.filterwarnings("ignore")
def test_the_prompts_of_dreambooth_are_cleaned_as_by_diffusers(of_diffusers):
    file = skip_without(VOCABULARIES.parent / "dreambooth" / "dataset" / "prompts_and_classes.txt")
    prompts = [p.format("xyz", "dog") for p in re.findall(r"^'(.*)'\.format", file.read_text(), re.MULTILINE)]
    assert len(prompts) == 50
    assert list(map(clean_caption, prompts)) == of_diffusers(prompts)
    assert all("xyz dog" in clean_caption(prompt) for prompt in prompts)


def test_captions_like_file_names_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean_caption("dog.txt") == "dog. txt"
