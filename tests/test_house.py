"""Which files and rooms import each other, read from their import statements."""
import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
         for file in (ROOT / "kl_reg").rglob("*.py")}


def imports(source):
    """The modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
    return found & set(FILES)


def room(module):
    """The package below kl_reg that a module stands in; a module at the top is a room of its own."""
    return ".".join(module.split(".")[:2])


GRAPH = {name: imports(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def test_no_files_import_each_other():
    list(graphlib.TopologicalSorter(GRAPH).static_order())                  # raises CycleError


def test_no_rooms_import_each_other():
    """Nor in a circle."""
    rooms = {}
    for name, others in GRAPH.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    list(graphlib.TopologicalSorter(rooms).static_order())


def test_an_import_inside_a_function_counts():
    assert imports("def f():\n    from kl_reg.kl import exact, budget\n    import kl_reg.types\n") == {
        "kl_reg.kl.exact", "kl_reg.kl.budget", "kl_reg.types"}
    assert imports("from kl_reg.kl.exact import reverse_kl\nimport jax\n") == {"kl_reg.kl.exact"}
