"""The JSON body of POST /caption, for the OpenAPI document."""

from typing import Annotated

from pydantic import BaseModel, Field

from server.requests.fields import CaptionFields
from server.requests.parts import MOST_IMAGES


class ImageEntry(BaseModel):
    """One of several images. image: base64, or a data URL."""

    image: str
    prompt: str | None = None


class CaptionRequest(CaptionFields):
    """Send exactly one of image, images, video and image_url."""

    image: Annotated[
        str | list[str] | None,
        Field(description="Base64, also as a data URL; a list with one for each frame for video "
              "checkpoints."),
    ] = None  # fmt: skip
    images: Annotated[
        list[str | ImageEntry] | None,
        Field(
            max_length=MOST_IMAGES,
            description="Several, each with a caption or an error of its own.",
        ),
    ] = None
    video: Annotated[
        str | None, Field(description="Base64 of a clip, of which frames are taken evenly.")
    ] = None
    image_url: Annotated[
        Annotated[str, Field(pattern="^https://")] | list[str] | None,
        Field(description="Where to fetch the image, or several; switched off unless the server "
              "allows domains."),
    ] = None  # fmt: skip
