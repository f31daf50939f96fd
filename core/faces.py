"""
Faces in pixel art: a small data set in colour, drawn from the designs in this file.

A face has a design for each of its parts and a colour for each of its paints. Within its class
they are independent. No part hides any of another one, so bench/faces.py can read a face back.
To add a design, add its name and its rows; to add a colour, name it where it may be used.
"""
import numpy as np
import torch

SIZE = 16
CLASSES = ["plain", "glasses", "hat", "beard", "cat"]
COLOURS = {name: list(bytes.fromhex(code)) for name, code in (pair.split(":") for pair in """
    ink:241a33 white:fffaf0 gold:fff651 blush:ff7f8d copper:c24a30 red:f73b3c wine:c2154b
    mint:96e0b4 sky:82c8fa rose:ffb0c7 lilac:be9cf0 sea:3c96a0 leaf:50b450 pine:147850
    ivory:ffe4bb peach:e3b887 tan:c8805b umber:8e5a36 cocoa:592e32 dusk:514d7c wood:8e2537
    straw:f4be30 butter:ffec85 fire:f77122 sun:ff8357 steel:a0aabc snow:c9e3f3 pink:e14b95
    candy:ff7cc9 blue:3c6ee6 navy:1d3296 grape:9646c8 plum:5a1797
    """.split())}
PAINTS = {                       # the letters of its tones, and the colours to choose from
    "background": (".", "mint sky rose lilac sea"),
    "skin": ("sS", "ivory,peach peach,tan tan,umber umber,cocoa"),
    "hair": ("hH", "ink,dusk wood,copper fire,sun straw,butter steel,snow pink,candy"),
    "extra": ("xX", "red,wine blue,navy leaf,pine grape,plum"),    # of hats, glasses, flowers
    "fabric": ("cC", "red,wine blue,navy leaf,pine grape,plum straw,butter"),
    "iris": ("e", "ink blue pine"),
    "ink": ("k", "ink"), "white": ("w", "white"), "gold": ("y", "gold"), "red": ("r", "red"),
    "blush": ("p", "blush"),
}

# Each part, the row and column where its designs begin, and these. A dot shows what is beneath.
# A class with designs of its own for a part, as hat:cap is of class hat, uses no others.
DESIGNS = """
bare 2 3
    bare
    ..ssssss..
    .ssssssss.
    ssssssssss
    ssssssssss
    ssssssssss
    SssssssssS
    ssssssssss
    ssssssssss
    .ssssssss.
    ..ssssss..
    ...SSSS...

head 0 1
    short          bun            mohawk         spikes         hat:cap        hat:crown
    .............. .....hhhh..... .....hhh...... ..h..h..h..h.. .............. ..............
    ....hhhhhh.... .....hHHh..... .....hHhh..... .hh.hh.hh.hh.h ...xxxxxxx.... .y..y.yy.y..y.
    ..hhhHHHhhhh.. ....hhhhhh.... .....hHHh..... .hhhhHhhhhhhh. .xxxxxxxxxxx.. .yy.yyyyyy.yy.
    .hhhHHhhhhhhh. ..hhhHHhhhhh.. .....hhhh..... hhhHHhhhhhhhh. .xxxxxxxxxxx.. .yyxyyxxyyxyy.
    .hhhh..hhhhhh. .hhhh....hhhh. ......hh...... .hhh.hh.hh.hhh .xxXXXXXXXXXXX .hhhhhhhhhhhh.
    .hh........hh. .hh........hh. .............. .hh........hh. .hh........hh. .hh........hh.
    .h..........h. .h..........h. .............. .h..........h. .h..........h. .h..........h.

    hat:topper     hat:beanie     hat:witch      cat:kitten     cat:tabby      cat:lynx
    ...xxxxxxxx... .....wwww..... .......xx..... .h..........h. .............. .hh........hh.
    ...xxxxxxxx... ....xwwwwx.... ......xxx..... .hh........hh. .hhh......hhh. .hphh....hhph.
    ...xxxxxxxx... ..xxxxxxxxxx.. ....xxxxxx.... .hphhhhhhhhph. .hpphhhhhhpph. .hpphhhhhhpph.
    ...XXXXXXXX... .xxxxxxxxxxxx. ...XXXXXXXX... .hhhhHHhhhhhh. .hhhhHhHhhhhh. .hhhhHHHHhhhh.
    xxxxxxxxxxxxxx .XxXxXxXxXxXx. xxxxxxxxxxxxxx .hhh..hh..hhh. .hhhhhhhhhhhh. .hhh......hhh.
    .hh........hh. .hh........hh. .hh........hh. .hh........hh. hhh........hhh .hh........hh.
    .h..........h. hh..........hh hh..........hh .h..........h. hh..........hh hh..........hh
    .............. hh..........hh hh..........hh .............. .h..........h. hh..........hh
    .............. .h..........h. .h..........h. .............. .............. .h..........h.

    bob            long           curls          pigtails       flower         parting
    .............. .............. ...hhh.hhh.... .............. .xx.xx........ ..............
    ....hhhhhh.... ....hhhhhh.... .hhhhHhhhhhhh. ...hhhhhh..... ..xyxhhhh..... ...hhhhhhhh...
    ..hhhHHHhhhh.. ..hhhhHHhhhh.. hhhHHhhhhhhhhh ..hhhhHHhhhh.. .xxhxxhHHhhh.. .hhhhhhHHhhhh.
    .hhhHHhhhhhhh. .hhhHHhhhhhhh. hhHhhhhhhhhhhh .hhhhHHhhhhhh. .hhhhhHHhhhhh. .hhhhhHHhhhhh.
    .hhhhhhhhhhhh. .hhhh....hhhh. hhhh.hhhh.hhhh .hhh..hh..hhh. .hhhh....hhhh. .hhhhhhhh..hh.
    hhh........hhh hhh........hhh hhh........hhh xhh........hhx .hh........hh. .hh........hh.
    hh..........hh hh..........hh hh..........hh xX..........Xx hh..........hh .h..........h.
    hh..........hh hh..........hh .h..........h. hh..........hh hh..........hh ..............
    Hh..........hh hh..........hh hh..........hh Hh..........hH .h..........h. ..............
    hh..........hh hh..........hh hh..........hh hh..........hh .............. ..............
    .h..........h. hH..........hh .h..........h. h............h .............. ..............
    .............. hHh........hhh .............. .............. .............. ..............

brow 5 4
    none     soft     long     glasses:round glasses:rims glasses:half glasses:bold
    ........ .hh..hh. hhh..hhh .XX..XX.      ........     ........     XXXXXXXX
    ........ ........ ........ X..XX..X      X..XX..X     ........     X..XX..X
    ........ ........ ........ X..XX..X      X..XX..X     X..XX..X     X..XX..X
    ........ ........ ........ .XX..XX.      .XX..XX.     .XX..XX.     ........

eyes 6 5
    bright glossy side   dots   sleepy wink   glasses:ahead glasses:aside glasses:up
    kw..kw kk..kk we..we .e..e. ...... kw.... wk..kw        wk..wk        kw..kw
    ke..ke ew..ew we..we .e..e. kk..kk ke..kk wk..kw        wk..wk        ww..ww

cheeks 8 3
    plain      blush      freckles   clown      cat:whiskers cat:tabby  cat:rosy
    ....SS.... ....SS.... ....SS.... ....rr.... .k..pp..k.   ....kk.... ....kk....
    .......... .pp....pp. .S......S. .......... .k......k.   .k......k. .pp....pp.

    beard:full beard:bushy beard:goatee beard:moustache beard:stubble
    ....SS.... ..hhhhhh..  ....SS....   ..hhSShh..      ....SS....
    hh......hh hh......hh  ..........   ..........      SS......SS
    .hh....hh. .hh....hh.  ..........   ..........      .SS....SS.
    .hhhhhhhh. .hhhhhhhh.  ...hhhh...   ..........      ..SSSSSS..
    ..hhhhhh.. ..hhhhhh..  ....hh....   ..........      ..........

mouth 9 6
    smile grin laugh calm oh   lips tongue smirk
    k..k  kwwk kkkk  .... .kk. .... kkkk   ...k
    .kk.  .kk. .rr.  .kk. .rr. .rr. ..p.   .kk.

earrings 8 3
    none       studs      pearls     one
    .......... y........y w........w y.........

clothes 13 1
    tee            stripes        roll           suit           hoodie         scarf
    ....cCSSCc.... ....ccSScc.... ....CCCCCC.... ....cwwwwc.... ...CCccccCC... ...CCCCCCCC...
    ..cccccccccc.. ..wwwwwwwwww.. ..cccccccccc.. ..ccCwwwwCcc.. .cCccwccwccCc. ..ccccCCcccc..
    .cccccccccccc. .cccccccccccc. .cccccccccccc. .cccCCwwCCccc. .cccccccccccc. .cccccCCccccc.
"""
LETTERS = "".join(letters for letters, _ in PAINTS.values())      # the dot, or background, is first


def read_sheet(text):
    """{part: {design: uint8 (16, 16), which of LETTERS is where}} of the designs above."""
    parts = {}
    for block in text.strip("\n").split("\n\n"):
        lines = block.splitlines()
        if lines[0][0] != " ":                                    # the beginning of a part
            part, top, left = lines.pop(0).split()
        names, *rows = [line.split() for line in lines]
        for name, *design in zip(names, *rows):
            canvas = parts.setdefault(part, {})[name] = np.zeros((SIZE, SIZE), np.uint8)
            for i, row in enumerate(design, int(top)):
                canvas[i, int(left):int(left) + len(row)] = [LETTERS.index(c) for c in row]
    return parts


PARTS = read_sheet(DESIGNS)
BARE = PARTS.pop("bare")["bare"]
COLUMNS = [*PARTS, *PAINTS]      # a face is a row of numbers: of its designs, then of its colours


def tones(paint):
    """The tones of each of a paint's colours, uint8 (colours, tones, 3)."""
    return np.uint8([[COLOURS[name] for name in colour.split(",")]
                     for colour in PAINTS[paint][1].split()])


def designs_of(kind, part):
    """The numbers of the designs that a class has for a part."""
    owners = [name.split(":")[0] if ":" in name else "" for name in PARTS[part]]
    return np.flatnonzero([owner == (kind if kind in owners else "") for owner in owners])


def draw_letters(faces):
    """Which of LETTERS is where, uint8 (N, 16, 16), in faces (N, columns)."""
    letters = np.repeat(BARE[None], len(faces), 0)
    for designs, chosen in zip(PARTS.values(), faces.T):
        part = np.stack([*designs.values()])[chosen]
        letters = np.where(part, part, letters)
    return letters


def draw(faces):
    """Pictures uint8 (N, 3, 16, 16) of faces (N, columns)."""
    letters = draw_letters(faces)
    palette = np.concatenate([tones(paint)[column] for paint, column in
                              zip(PAINTS, faces.T[len(PARTS):])], 1)       # (N, letters, 3)
    x = palette[np.arange(len(faces))[:, None, None], letters]
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def draw_faces(n, seed=0):
    """
    n faces: pictures uint8 (n, 3, 16, 16), classes (n,), and rows of numbers (n, columns).

    The classes come in turn. A paint that a face does not use has the number -1.
    """
    rng, y = np.random.default_rng(seed), np.arange(n) % len(CLASSES)
    faces = np.empty((n, len(COLUMNS)), np.int64)
    for j, part in enumerate(PARTS):
        for k, kind in enumerate(CLASSES):
            faces[y == k, j] = rng.choice(designs_of(kind, part), (y == k).sum())
    for j, paint in enumerate(PAINTS, len(PARTS)):
        faces[:, j] = rng.integers(len(tones(paint)), size=n)
    letters = draw_letters(faces)
    for j, (used, _) in enumerate(PAINTS.values(), len(PARTS)):
        uses = np.isin(letters, [LETTERS.index(c) for c in used]).any((1, 2))
        faces[~uses, j] = -1
    return draw(faces), torch.from_numpy(y), faces
