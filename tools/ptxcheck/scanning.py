"""The words of PTX text: patterns, literals, lists, and the scopes of names."""

from __future__ import annotations

import re
import struct

from .syntax import Imm, Reg

COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.S)
LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)(?:\s+(\d+))?.*$")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?.*$')
NAME = re.compile(r"[A-Za-z_$%][A-Za-z0-9_$]*")
LABEL = re.compile(r"\s*([A-Za-z_$][A-Za-z0-9_$]*)\s*:(?!:)")
GUARD = re.compile(r"@\s*(!?)\s*([%A-Za-z_$][\w$]*)\s*")
NUMBER = re.compile(
    r"[+-]?\s*(?:0[fFdD][0-9a-fA-F]+|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|"
    r"\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?)$"
)


def blank(match):
    """A comment as spaces, so that positions and lines stay; strings as they are."""
    text = match.group(0)
    if text.startswith('"'):
        return text
    return re.sub(r"[^\n]", " ", text)


def parse_number(text):
    """Text of a PTX literal -> Imm."""
    t = text.replace(" ", "")
    neg = t.startswith("-")
    t = t.lstrip("+-")
    low = t.lower()
    if low.startswith("0f") and len(t) == 10:
        v = struct.unpack("<f", struct.pack("<I", int(t[2:], 16)))[0]
        if v != v:  # keep NaN payloads exact
            return Imm(int(t[2:], 16), "f32bits")
        return Imm(-v if neg else v, "f32")
    if low.startswith("0d") and len(t) == 18:
        v = struct.unpack("<d", struct.pack("<Q", int(t[2:], 16)))[0]
        return Imm(-v if neg else v, "f64")
    if "." in t or ("e" in low and not low.startswith("0x")):
        v = float(t)
        return Imm(-v if neg else v, "f64")
    t = t.rstrip("uU")
    low = t.lower()
    if low.startswith("0x"):
        v = int(t, 16)
    elif low.startswith("0b"):
        v = int(t, 2)
    elif len(t) > 1 and t[0] == "0":
        v = int(t, 8)
    else:
        v = int(t)
    return Imm(-v if neg else v, "i")


def split_top(text, sep=","):
    """Split at top-level separators (outside brackets)."""
    out, depth, cur = [], 0, []
    for ch in text:
        if ch in "[{(":
            depth += 1
        elif ch in "]})":
            depth -= 1
        if ch == sep and depth == 0:
            out.append("".join(cur).strip())
            cur = []
        else:
            cur.append(ch)
    last = "".join(cur).strip()
    if last or out:
        out.append(last)
    return out


class Scope:
    def __init__(self, parent=None):
        self.parent = parent
        self.names = {}
        self.labels = {}
        self.families = []  # (prefix, count, type) for %r<10>
        self._made = {}

    def find(self, name):
        scope = self
        while scope is not None:
            hit = scope.names.get(name)
            if hit is not None:
                return hit
            for prefix, count, type_ in scope.families:
                if (
                    name.startswith(prefix)
                    and name[len(prefix) :].isdigit()
                    and int(name[len(prefix) :]) < count
                ):
                    reg = Reg(name, type_)
                    scope.names[name] = reg
                    return reg
            scope = scope.parent
        return None

    def label(self, name):
        scope = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None
