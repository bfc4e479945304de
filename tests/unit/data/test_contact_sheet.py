import torch
from PIL import Image

from convnext_cli.data.contact_sheet import Cell, render_sheet


def cell(colour: int, px: int = 300, name: str = "robin") -> Cell:
    return Cell(image_CHW=torch.full((3, px, px), colour, dtype=torch.uint8), name=name)


def test_each_picture_is_on_the_sheet_in_its_place():
    sheet = render_sheet([(cell(50), cell(100)), (cell(150), cell(200))], title="two rows")

    found = {
        sheet.getpixel((x, y))[0]
        for x in range(0, sheet.width, 8)
        for y in range(0, sheet.height, 8)
    }
    assert {50, 100, 150, 200} <= found


def test_more_rows_than_six_are_set_in_two_columns():
    one = render_sheet([(cell(9),)] * 6, title="")
    two = render_sheet([(cell(9),)] * 12, title="")

    assert two.height == one.height
    assert two.width > 1.8 * one.width


def test_tiny_pictures_grow_in_whole_pixels():
    checks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    checks[:, ::2, ::2] = 255

    sheet = render_sheet([(Cell(image_CHW=checks, name="9"),)], title="")

    colours = {colour for _, colour in sheet.crop((12, 30, 150, 170)).getcolors(9999)}
    assert colours <= {(0, 0, 0), (255, 255, 255)}


def test_long_names_and_thread_like_pictures_stay_within_their_tile():
    thread = torch.zeros(3, 1, 5000, dtype=torch.uint8)
    name = "a very long class name that no tile could ever hold, because it goes on and on"

    sheet = render_sheet([(Cell(image_CHW=thread, name=name), cell(0, name=""))], title=name * 9)

    assert isinstance(sheet, Image.Image)
    right = [sheet.getpixel((160, y)) for y in range(30 + 145, 30 + 176)]
    assert set(right) == {(255, 255, 255)}
