"""The cluster that the other tests of this folder use."""


def test_nodes_have_names_and_process_trees_of_their_own_and_can_be_powered_off(cluster, tmp_path):
    out = cluster.command("srun", "-N4", "--ntasks-per-node=1", "bash", "-c", "hostname; ls /proc | grep -c '^[0-9]'")
    assert sorted(word for word in out.split() if word.startswith("n")) == ["n1", "n2", "n3", "n4"]
    assert all(int(word) < 20 for word in out.split() if word.isdecimal()), "a node sees the machine's processes"
    cluster.power_off("n4")
    cluster.command("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=test")  # or it takes the controller long
    cluster.power_on("n4")
    cluster.wait_idle()
