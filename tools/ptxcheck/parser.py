"""PTX text -> the objects of :mod:`syntax`."""

from __future__ import annotations

import bisect
import re
import struct

from .errors import PtxSyntaxError
from .scanning import (
    COMMENT,
    FILE,
    GUARD,
    LABEL,
    LOC,
    NAME,
    NUMBER,
    Scope,
    blank,
    parse_number,
    split_top,
)
from .syntax import (
    SINK,
    SPECIAL,
    TYPE_WIDTH,
    Addr,
    Args,
    Function,
    Imm,
    Ins,
    Label,
    LabelDef,
    ModuleAst,
    Not,
    Pair,
    Reg,
    SReg,
    Sym,
    TensorAddr,
    Var,
    Vec,
)


class Parser:
    def __init__(self, text):
        self.raw = text
        text = COMMENT.sub(blank, text)
        self.ast = ModuleAst()
        self.loc_lines, self.loc_vals = [], []
        lines = text.split("\n")
        for i, ln in enumerate(lines):
            if ".loc" in ln:
                m = LOC.match(ln)
                if m:
                    self.loc_lines.append(i + 1)
                    self.loc_vals.append((int(m.group(1)), int(m.group(2))))
                    lines[i] = ""
                    continue
            if ".file" in ln:
                m = FILE.match(ln)
                if m:
                    name = m.group(3) if m.group(3) else m.group(2)
                    self.ast.files[int(m.group(1))] = name
                    lines[i] = ""
        self.text = "\n".join(lines)
        self.line_starts = [0]
        for m in re.finditer("\n", self.text):
            self.line_starts.append(m.end())
        self.pos = 0
        self.module_scope = Scope()

    # -- helpers
    def line_of(self, pos):
        return bisect.bisect_right(self.line_starts, pos)

    def loc_of(self, line):
        i = bisect.bisect_right(self.loc_lines, line) - 1
        if i < 0:
            return None
        f, ln = self.loc_vals[i]
        name = self.ast.files.get(f, f"file{f}")
        return f"{name.rsplit('/', 1)[-1]}:{ln}"

    def fail(self, msg, pos=None):
        line = self.line_of(self.pos if pos is None else pos)
        raise PtxSyntaxError(f"PTX line {line}: {msg}")

    def skip_ws(self):
        t, n = self.text, len(self.text)
        while self.pos < n and t[self.pos] in " \t\r\n":
            self.pos += 1

    def until(self, stop):
        j = self.text.find(stop, self.pos)
        if j < 0:
            self.fail(f"missing {stop!r}")
        s = self.text[self.pos : j]
        self.pos = j + 1
        return s

    # -- top level
    def parse(self):
        while True:
            self.skip_ws()
            if self.pos >= len(self.text):
                break
            m = re.compile(r"\.(\w+)").match(self.text, self.pos)
            if not m:
                self.fail(f"unexpected text {self.text[self.pos : self.pos + 40]!r}")
            word = m.group(1)
            if word in ("version", "target", "address_size"):
                eol = self.text.find("\n", self.pos)
                eol = len(self.text) if eol < 0 else eol
                val = self.text[m.end() : eol].strip()
                if word == "version":
                    self.ast.version = val
                elif word == "target":
                    self.ast.target = val
                self.pos = eol
            elif word == "section":
                self.until("{")
                depth = 1
                while depth:
                    ch = self.text[self.pos]
                    depth += (ch == "{") - (ch == "}")
                    self.pos += 1
            elif word in ("pragma", "alias"):
                self.until(";")
            else:
                self.toplevel_decl()
        return self.ast

    def toplevel_decl(self):
        """A variable or a function."""
        start = self.pos
        m = re.compile(r"(?:\s*\.(?:visible|extern|weak|common))*\s*\.(entry|func)\b").match(
            self.text, self.pos
        )
        if m:
            self.pos = m.end()
            return self.function(m.group(1) == "entry", start)
        self.var_decl(self.module_scope, None)

    def var_decl(self, scope, func):
        start = self.pos
        text = self.until(";")
        if text.count("{") != text.count("}"):
            self.fail("unbalanced braces in a variable", start)
        for v in self.make_vars(text, start):
            scope.names[v.name] = v
            if func is None:
                self.ast.vars[v.name] = v
            else:
                func.vars.append(v)

    def make_vars(self, text, pos):
        head, _, init = text.partition("=")
        dirs = re.match(r"\s*((?:\.[\w:]+(?:\s+\d+(?=\s))?\s*)+)", head)
        if not dirs:
            self.fail(f"cannot parse declaration {text.strip()[:60]!r}", pos)
        words = re.findall(r"\.([\w:]+)(?:\s+(\d+)(?=\s))?", dirs.group(1))
        space = type_ = None
        align, extern, vec = None, False, 1
        for w, arg in words:
            if w in ("global", "const", "shared", "local", "param"):
                space = w
            elif w == "align":
                align = int(arg)
            elif w == "extern":
                extern = True
            elif w in ("v2", "v4"):
                vec = int(w[1])
            elif w in TYPE_WIDTH:
                type_ = w
        rest = head[dirs.end() :].strip()
        out = []
        for one in split_top(rest):
            m = re.match(r"([A-Za-z_$%][\w$]*)\s*((?:\[[^\]]*\]\s*)*)$", one)
            if not m or type_ is None:
                self.fail(f"cannot parse declaration {text.strip()[:60]!r}", pos)
            esize = TYPE_WIDTH[type_] // 8 * vec
            count, unsized = 1, False
            for d in re.findall(r"\[([^\]]*)\]", m.group(2)):
                if d.strip() == "":
                    unsized = True
                else:
                    count *= parse_number(d.strip()).value
            v = Var(m.group(1), space, align or esize, type_, esize * count, extern)
            if unsized:
                v.size = 0
            if init.strip():
                self.parse_init(v, init.strip(), TYPE_WIDTH[type_] // 8)
            out.append(v)
        return out

    def parse_init(self, v, text, esize):
        flat = re.sub(r"[{}]", " ", text)
        data = bytearray()
        for tok in (t.strip() for t in split_top(flat)):
            if not tok:
                continue
            if NUMBER.match(tok):
                imm = parse_number(tok)
                if v.type == "f32":
                    val = imm.value if imm.kind == "f32bits" else None
                    data += (
                        struct.pack("<I", val)
                        if val is not None
                        else struct.pack("<f", float(imm.value))
                    )
                elif v.type == "f64":
                    data += struct.pack("<d", float(imm.value))
                else:
                    data += (int(imm.value) & ((1 << (8 * esize)) - 1)).to_bytes(esize, "little")
            else:
                m = re.match(r"(?:generic\s*\(\s*([\w$]+)\s*\)|([\w$]+))\s*(?:\+\s*(\d+))?$", tok)
                if not m:
                    raise PtxSyntaxError(f"initializer of {v.name}: cannot parse {tok!r}")
                v.relocs.append((len(data), m.group(1) or m.group(2), int(m.group(3) or 0)))
                data += bytes(esize)
        if v.size == 0:
            v.size = len(data)
        data += bytes(max(0, v.size - len(data)))
        v.init = bytes(data)

    # -- functions
    def paren_params(self):
        self.skip_ws()
        if self.pos >= len(self.text) or self.text[self.pos] != "(":
            return None
        self.pos += 1
        start = self.pos
        text = self.until(")")
        out = []
        for p in split_top(text):
            if not p:
                continue
            p = re.sub(r"\.ptr\b(\s*\.(global|const|local|shared))?(\s*\.align\s+\d+)?", " ", p)
            if ".reg" in p:
                raise PtxSyntaxError(
                    f"PTX line {self.line_of(start)}: .reg parameters of device "
                    "functions are not supported"
                )
            out += self.make_vars(p, start)
        return out

    def function(self, is_entry, start):
        returns = self.paren_params() or []
        self.skip_ws()
        m = NAME.match(self.text, self.pos)
        if not m:
            self.fail("function name expected")
        name = m.group(0)
        self.pos = m.end()
        params = self.paren_params() or []
        fn = Function(name, is_entry, params, returns, line=self.line_of(start))
        # performance directives up to '{' or ';'
        while True:
            self.skip_ws()
            ch = self.text[self.pos]
            if ch == ";":
                self.pos += 1
                self.ast.functions.setdefault(name, fn)
                return
            if ch == "{":
                self.pos += 1
                break
            m = re.compile(r"\.(\w+)([^\n{;]*)").match(self.text, self.pos)
            if not m:
                self.fail("cannot parse function header")
            if m.group(1) == "explicitcluster":
                fn.explicit_cluster = True
            if m.group(1) == "maxclusterrank":
                fn.max_cluster = int(m.group(2))
            if m.group(1) == "maxnreg":
                fn.maxnreg = int(m.group(2))
            if m.group(1) in ("reqntid", "maxntid", "reqnctapercluster"):
                dims = [int(x) for x in re.findall(r"\d+", m.group(2))]
                setattr(fn, m.group(1), tuple(dims + [1] * (3 - len(dims))))
            self.pos = m.end()
        fn.has_body = True
        self.body(fn)
        self.ast.functions[name] = fn

    def body(self, fn):
        scope = Scope(self.module_scope)
        for v in fn.params + fn.returns:
            scope.names[v.name] = v
        pending = []
        text = self.text
        depth = 1
        while depth:
            self.skip_ws()
            if self.pos >= len(text):
                self.fail("end of text inside a function")
            ch = text[self.pos]
            if ch == "{":
                scope = Scope(scope)
                depth += 1
                self.pos += 1
                continue
            if ch == "}":
                scope = scope.parent
                depth -= 1
                self.pos += 1
                continue
            if ch == ";":
                self.pos += 1
                continue
            m = LABEL.match(text, self.pos)
            if m:
                lab = LabelDef(m.group(1))
                scope.labels[m.group(1)] = lab
                fn.items.append(lab)
                self.pos = m.end()
                # a label may carry a .branchtargets / .callprototype directive
                d = re.compile(r"\s*\.(branchtargets|callprototype|calltargets)\b").match(
                    text, self.pos
                )
                if d:
                    self.pos = d.end()
                    names = [s.strip() for s in self.until(";").split(",")]
                    if d.group(1) == "branchtargets":
                        scope.names["." + m.group(1)] = (scope, names)
                continue
            if ch == ".":
                self.directive(fn, scope)
                continue
            start = self.pos
            stmt = self.until(";")
            pending.append((len(fn.items), scope, stmt, start))
            fn.items.append(None)
        for idx, sc, stmt, start in pending:
            fn.items[idx] = self.instruction(stmt, sc, start, fn.name)

    def directive(self, fn, scope):
        m = re.compile(r"\.(\w+)").match(self.text, self.pos)
        word = m.group(1)
        if word == "reg":
            start = self.pos
            text = self.until(";")
            d = re.match(r"\.reg\s*((?:\.\w+\s*)+)(.*)$", text, re.S)
            if not d:
                self.fail(f"cannot parse {text!r}", start)
            words = re.findall(r"\.(\w+)", d.group(1))
            if words[-1] not in TYPE_WIDTH or any(w in ("v2", "v4") for w in words):
                self.fail(f"unsupported register declaration {text!r}", start)
            for name in split_top(d.group(2)):
                f = re.match(r"([%\w$]+)\s*<\s*(\d+)\s*>$", name)
                if f:
                    scope.families.append((f.group(1), int(f.group(2)), words[-1]))
                else:
                    scope.names[name] = Reg(name, words[-1])
        elif word in ("shared", "local", "param", "global", "const"):
            self.var_decl(scope, fn)
        elif word in ("pragma", "minnctapersm", "maxnctapersm"):
            self.until(";")
        else:
            self.fail(f"unknown directive .{word}")

    # -- instructions
    def instruction(self, stmt, scope, pos, func):
        line = self.line_of(pos)
        text = " ".join(stmt.split())
        s = stmt.strip()
        guard, neg = None, False
        m = GUARD.match(s)
        if m:
            neg = bool(m.group(1))
            guard = scope.find(m.group(2))
            if not isinstance(guard, Reg):
                self.fail(f"unknown guard {m.group(2)}", pos)
            s = s[m.end() :]
        m = re.match(r"([a-z][\w.:]*)\s*", s)
        if not m:
            self.fail(f"cannot parse instruction {text!r}", pos)
        op = m.group(1)
        rest = s[m.end() :].strip()
        base = op.split(".")[0]
        ops = []
        for part in split_top(rest):
            ops.append(self.operand(part, scope, pos, base))
        return Ins(op, ops, guard, neg, line, self.loc_of(line), text, func)

    def operand(self, text, scope, pos, base):
        t = text.strip()
        if not t:
            self.fail("empty operand", pos)
        if t == "_":
            return SINK
        c = t[0]
        if c == "{":
            return Vec([self.operand(p, scope, pos, base) for p in split_top(t[1:-1])])
        if c == "(":
            if base == "call":
                return Args([self.operand(p, scope, pos, base) for p in split_top(t[1:-1]) if p])
            return self.operand(t[1:-1], scope, pos, base)
        if c == "[":
            inner = t[1:-1].strip()
            if "," in inner:
                parts = split_top(inner)
                if len(parts) != 2 or not parts[1].startswith("{"):
                    self.fail(f"operand form {t!r} is not supported", pos)
                return TensorAddr(
                    self.address(parts[0], scope, pos),
                    self.operand(parts[1], scope, pos, base).items,
                )
            return self.address(inner, scope, pos)
        if c == "!":
            return Not(self.operand(t[1:], scope, pos, base))
        if "|" in t:
            a, b = t.split("|", 1)
            return Pair(self.operand(a, scope, pos, base), self.operand(b, scope, pos, base))
        if NUMBER.match(t):
            return parse_number(t)
        if base in ("bra", "brx"):
            lab = scope.label(t)
            if lab is not None:
                tl = scope.find("." + t)
                if base == "brx" and tl is not None:
                    return Args([Label(tl[0].label(n)) for n in tl[1]])
                return Label(lab)
        hit = scope.find(t)
        if hit is not None:
            return hit if isinstance(hit, Reg) else Sym(hit)
        if c == "%":
            nm = t[1:]
            if nm.split(".")[0] in SPECIAL or nm.startswith(("pm", "envreg")):
                return SReg(nm)
        m = re.match(r"([\w$%]+)\s*([+-])\s*(\d+)$", t)
        if m and scope.find(m.group(1)) is not None:
            off = int(m.group(3)) * (-1 if m.group(2) == "-" else 1)
            return Sym(scope.find(m.group(1)), off)
        if t in ("WARP_SZ",):
            return Imm(32, "i")
        if base == "call" and re.match(r"[\w$]+$", t):
            return Sym(t)
        if base == "mov" and re.match(r"[\w$]+$", t):
            return Sym(t)  # address of a function: reported when bound
        self.fail(f"unknown operand {t!r}", pos)

    def address(self, text, scope, pos):
        m = re.match(r"([%\w$]+)\s*(?:([+-])\s*([+-]?\s*\w+))?$", text)
        if not m:
            self.fail(f"cannot parse address [{text}]", pos)
        off = 0
        if m.group(3):
            off = parse_number(m.group(3)).value
            if m.group(2) == "-":
                off = -off
        name = m.group(1)
        if NUMBER.match(name):
            return Addr(None, parse_number(name).value + off)
        hit = scope.find(name)
        if hit is None:
            self.fail(f"unknown symbol in address [{text}]", pos)
        return Addr(hit, off)


def parse(text):
    """Parse PTX text into a :class:`ModuleAst`."""
    return Parser(text).parse()
